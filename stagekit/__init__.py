"""What the stage scripts share: plain functions, called in order, by name."""
