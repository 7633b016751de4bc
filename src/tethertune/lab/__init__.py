"""Experiments: configurations, images, models, training runs and reports. Needs the extra ``tethertune[lab]``."""
