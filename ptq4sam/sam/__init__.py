"""What families of SAMs share: prompt encoder, mask decoder, descriptions, prediction."""
