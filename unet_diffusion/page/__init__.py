"""The page of `unet app`, a file for each of its tabs. Only the command imports it."""
