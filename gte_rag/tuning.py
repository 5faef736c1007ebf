Tuning = tune = None
