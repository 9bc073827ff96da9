"""`python -m compress`: the command line."""

from compress.entry import main

main()
