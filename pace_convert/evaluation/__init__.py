"""Does it help? Evaluations of converted models beside their base; everything they need comes with
`pace-convert[eval]`.
"""
