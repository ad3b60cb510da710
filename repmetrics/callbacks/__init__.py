"""Lightning callbacks: wiring only."""
