"""`fmtrain fit`: configuration, data module, checkpoints, progress, signals."""
