"""The networks that the methods and the demo need to run end to end."""
