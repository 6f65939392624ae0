"""Plans memory and speed on hardware that need not be present, by formula and by its compiler."""
