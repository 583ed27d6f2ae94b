"""What AIMET's packages have in common."""
