"""Files and folders in which FLUX and its LoRAs are published, read and written."""
