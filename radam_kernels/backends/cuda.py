def why_not(device_type):
    return "not written yet"
