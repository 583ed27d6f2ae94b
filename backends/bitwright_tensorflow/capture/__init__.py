"""From what the user holds to a model in the form that this backend works on."""
