"""What every training run needs: the loop, checkpoints, the run folder, command lines."""
