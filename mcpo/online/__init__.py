"""OnMC-PO: generate, judge, train, again."""
