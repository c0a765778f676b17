"""Projected Compression beside its control arm and with each part of our recipe, all else equal."""
