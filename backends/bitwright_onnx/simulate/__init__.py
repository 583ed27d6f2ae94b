"""Sessions and simulations."""
