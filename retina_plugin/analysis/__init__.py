"""What a model gets wrong: the numbers and the page of ``retina report``."""
