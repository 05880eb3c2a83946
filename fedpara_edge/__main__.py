"""`python -m fedpara_edge`: the command line."""

from fedpara_edge.cli import main

main()
