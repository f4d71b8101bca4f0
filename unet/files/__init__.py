"""Image files in, pictures and files that are written whole out."""
