import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;

/** Answers every request with the address of its client. */
public class Who {
	public static void main(String[] args) throws Exception {
		HttpServer server = HttpServer.create(new InetSocketAddress(Integer.parseInt(args[0])), 0);
		server.createContext("/", exchange -> {
			byte[] answer = exchange.getRemoteAddress().getAddress().getHostAddress().getBytes();
			exchange.sendResponseHeaders(200, answer.length);
			exchange.getResponseBody().write(answer);
			exchange.close();
		});
		server.start();
	}
}
