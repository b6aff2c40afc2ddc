"""Published weights and data sets: what there is, and how it gets here."""

from ptq4sam.downloads.catalogue import ASSETS, Asset, Digest, asset_of, find_asset, where_from
from ptq4sam.downloads.fetch import State, fetch, state_of

__all__ = [
    "ASSETS",
    "Asset",
    "Digest",
    "State",
    "asset_of",
    "fetch",
    "find_asset",
    "state_of",
    "where_from",
]
