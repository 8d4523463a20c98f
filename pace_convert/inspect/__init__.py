"""What `pace inspect` finds out beyond the headers: the experts' quality, what a text sets off, and
the page.
"""
