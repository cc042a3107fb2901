"""How good a trained model is: its loss on any text."""
