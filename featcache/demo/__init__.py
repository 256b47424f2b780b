"""The demo: real digits on real photographs, in VOC's layout, through the public commands."""
