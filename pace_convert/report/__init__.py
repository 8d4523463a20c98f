"""What `pace inspect` measures beyond a folder's headers: the experts' quality, and what a text sets off; and the page."""
