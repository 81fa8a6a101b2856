"""The parts that a build is made of, and how they are run, kept and resumed."""
