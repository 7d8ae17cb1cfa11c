"""What analyses are built of: their subject, laws held against the truth, statistics, and the `Finding`."""
