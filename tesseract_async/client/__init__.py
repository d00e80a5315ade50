"""The trainer's side: experts as torch modules, the mixture over them, and backward without blocking the loop."""
