"""What is compared: our engine, its rivals as a competent user would write them, and the limits of the machine."""
