def check_floor(*a):
    pass


def of_nothing(n):
    return []
