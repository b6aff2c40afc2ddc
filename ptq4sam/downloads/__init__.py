"""Published weights and data sets: what there is, how it gets here, and what is not here."""

from ptq4sam.downloads.catalogue import ASSETS, Asset, Digest, asset_at, find_asset, where_from
from ptq4sam.downloads.fetch import State, fetch, state_of
from ptq4sam.downloads.missing import Missing
from ptq4sam.downloads.pictures import fetch_pictures

__all__ = [
    "ASSETS",
    "Asset",
    "Digest",
    "Missing",
    "State",
    "asset_at",
    "fetch",
    "fetch_pictures",
    "find_asset",
    "state_of",
    "where_from",
]
