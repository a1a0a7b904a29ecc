"""What a point trains on: data sets, subsets and replacements, networks and their initialisation."""
