"""The page of `gim-jax web`: two images matched and looked at, and a browser of label sets."""
