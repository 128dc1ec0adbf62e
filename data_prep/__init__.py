"""Data preparation: videos to labelled pairs, and every other data set to records."""
