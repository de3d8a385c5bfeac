"""Stage one: masks and compensated weights. Shapes never change here."""
