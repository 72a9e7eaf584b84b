"""Static pages that show every feature of an SAE."""
