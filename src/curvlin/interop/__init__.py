"""Ways to other libraries, imported where they are used."""
