from handler.errors import end_on_interrupt

end_on_interrupt()
