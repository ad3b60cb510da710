"""`fmtrain sweep`: hyperparameter search over Optuna."""
