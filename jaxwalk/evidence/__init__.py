"""What analyses are built from: the subject, laws compared with the truth, statistics, and the `Finding`."""
