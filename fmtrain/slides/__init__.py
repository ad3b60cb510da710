"""Reading one slide: resolution, tiles, tissue; no torch."""
