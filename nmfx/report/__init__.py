"""What a person sees of schemes and searches: figures, and pages that hold them."""
