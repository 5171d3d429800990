"""Tasks, one file each; a data set says which of them it has."""
