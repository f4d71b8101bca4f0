"""The mathematics: noise is added and taken away. It calls a network and reads no file."""
