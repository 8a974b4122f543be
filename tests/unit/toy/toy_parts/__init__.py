"""Components for the slot of the toy recipe."""
