"""Sites and a budget in, a scheme out."""
