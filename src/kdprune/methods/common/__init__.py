"""What methods share: their base, budget and selection, stand-ins while they are fitted."""
