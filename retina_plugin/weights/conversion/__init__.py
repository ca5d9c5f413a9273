"""Converting the weights of other programs' RetinaNets."""
