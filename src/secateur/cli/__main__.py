"""For launchers that start modules: `accelerate launch -m secateur.cli train …`."""

from secateur.cli import main

main()
