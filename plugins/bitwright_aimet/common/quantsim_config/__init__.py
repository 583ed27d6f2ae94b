"""`aimet_common.quantsim_config`."""
