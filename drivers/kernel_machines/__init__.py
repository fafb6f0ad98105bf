"""What drivers/kernel.py is made of."""
