"""What says what a region shows."""
